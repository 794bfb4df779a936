"""What is known of the activations, and how it is measured."""
