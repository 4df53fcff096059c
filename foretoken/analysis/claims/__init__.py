"""The claims of five documents about parallel decoding, checked.

Numbers are computed here by the functions of `foretoken.analysis`; only measurements of others are typed, with their
source. `python -m foretoken.analysis.claims docs/claims.md` writes the page.
"""
