"""The folder that a board gets: manifest, target, report, checks, and how text is made with it."""
