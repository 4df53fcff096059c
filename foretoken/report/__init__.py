"""Pages of tables and figures that need nothing but themselves, and the same as Markdown."""
