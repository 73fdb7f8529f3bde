"""The `qlora` command: main, and one file for each subcommand."""
