"""Programs that write files of this tree, or judge it: goldens, tables, the embedded model."""
