"""Several runs that belong together: started one after another or beside one another, ranked, continued.

`start.py` tells the story; `directory.py` is what a sweep is on the disk.
"""
