"""What llama.cpp gives a task: a module for each kind of demand, named as in `engine/demands/`."""
