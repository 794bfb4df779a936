"""How good a program is: text, tasks, and the error of each layer."""
