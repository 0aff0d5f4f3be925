"""`python -m metis_home.cli`, for launchers that start modules (torchrun, accelerate launch)."""

from . import main

main()
