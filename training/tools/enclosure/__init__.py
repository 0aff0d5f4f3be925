"""What runs on the far side of the sandbox's door: a launcher that encloses one program and reports on it.

Standard library only, and nothing of metis_home: the launcher is started as `python -I -S` and imports these files from
their folder. `launch` starts it, `inside` is the first process of the enclosure, `mounts` makes its file system,
`confine` takes the rights of the program away, `seccomp` filters its system calls, `watch` bounds and ends it.
"""
