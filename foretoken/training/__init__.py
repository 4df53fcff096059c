"""What training needs and no method changes: text, tokens, losses, the loop."""
