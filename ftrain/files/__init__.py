"""Files that may come from anybody: opened below their folder, read within bounds."""
