"""Where the time of a forward pass goes, and its distance from the machine's peaks."""
