"""Results as HTML and as pictures."""
