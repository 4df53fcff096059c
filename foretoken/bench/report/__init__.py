"""From the rows of a comparison to a page: figures, tables, drawings, texts."""
