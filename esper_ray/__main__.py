"""`python -m esper_ray`."""

from esper_ray.cli import main

if __name__ == "__main__":
    main()
