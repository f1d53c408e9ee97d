"""What only a GPU needs: attention by the variable-length flash kernel."""
