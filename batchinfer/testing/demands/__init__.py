"""What the fake answers: a module for each kind of demand, named as in `engine/demands/`."""
