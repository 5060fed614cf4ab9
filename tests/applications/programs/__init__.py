"""Both ends of applications, run in nodes of the lab; they report like the traffic programs.

`python -m tests.applications.programs.NAME`, from the top of the repository.
"""
