"""The program, its dialect and formats, the pass contract, and the way from a checkpoint to an artefact."""
