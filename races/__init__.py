"""What race.py runs: experiments that train the same thing several times with one thing changed at a time."""
