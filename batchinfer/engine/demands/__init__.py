"""What a task may ask of an engine: a module for each kind of answer.

A module has the `Demand` (what all requests of a job share), the `Request`, if one needs more than
token ids, and the `Answer`. An engine runs those for which it has a module of the same name in its
own folder `demands`. Must not know: tasks, engines.
"""
