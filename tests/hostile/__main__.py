"""`python -m tests.hostile`: see tests/hostile/page.py."""

from tests.hostile.page import main

if __name__ == "__main__":
    main()
