"""What puts the ops into other people's models: the layers that are known, and how each one is swapped. Imports none of their packages."""
