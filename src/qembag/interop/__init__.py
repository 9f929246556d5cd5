"""Tables of other libraries: from their files and their live objects, and back."""
