"""Programs to begin from, 90 lines at most: copy one and change it."""
