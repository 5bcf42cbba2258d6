"""Three programs to begin from, about 60 lines each: copy one and change it."""
