"""A run on several devices: this process gives out the work, a process for each replica does it."""
