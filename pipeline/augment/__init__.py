"""Views of training rows: words exchanged, left out or moved."""
