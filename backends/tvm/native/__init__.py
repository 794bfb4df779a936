"""The program that runs a TVM artefact on a board."""
