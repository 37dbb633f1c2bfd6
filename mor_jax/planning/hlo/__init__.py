"""What a compiled program says about itself: traffic counted in its optimised HLO text."""
