"""One file per subcommand: its options, and the import of what does the work when it runs."""
