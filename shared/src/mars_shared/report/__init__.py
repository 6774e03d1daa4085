"""What a run came to, as one HTML file without scripts that opens from disk; and runs side by side."""
