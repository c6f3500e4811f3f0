"""The three programs from a checkout, not installed: python cli.py featcache …"""

from featcache_cli.programs import run_named

if __name__ == "__main__":
    run_named()
