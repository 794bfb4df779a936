"""What the passes look for in a graph. A matcher gives a match, or a NoMatch that says why not and where."""
