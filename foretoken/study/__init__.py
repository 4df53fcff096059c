"""`foretoken analyze`: what a model knows about its future, measured on a text, written as rows and shown as a page."""
