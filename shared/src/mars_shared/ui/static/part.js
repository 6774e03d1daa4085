// Parts of a view that are drawn anew when what they show has changed, and only then: whoever reads them keeps the place that has the
// focus, the text that is selected and how far a table was moved.

import { content, element } from "./dom.js";

export function part(name, attributes = {}) {
  const node = element(name, attributes);
  let drawn = null;
  return {
    node,
    // `draw` gives the children that show `data`.
    show(data, draw) {
      const text = JSON.stringify(data);
      if (text === drawn) return;
      drawn = text;
      const giveFocusBack = heldFocus(node);
      node.replaceChildren(...content(draw()));
      giveFocusBack();
    },
  };
}

// What within a node has the focus. The function that comes back gives it to the element that has taken that one's place, which is
// known by where it leads or by its name.
export function heldFocus(node) {
  const held = document.activeElement;
  if (held === node || !node.contains(held)) return () => {};
  return () => {
    const free = !held.isConnected && document.activeElement === document.body;
    const heir = free && [...node.querySelectorAll(held.localName)].find((other) => sameAttributes(held, other, ["href", "name"]));
    if (heir) heir.focus({ preventScroll: true });
  };
}

function sameAttributes(one, other, names) {
  return names.every((name) => one.getAttribute(name) === other.getAttribute(name));
}
