"""What is cut from where to where, and the manifest that says so."""
