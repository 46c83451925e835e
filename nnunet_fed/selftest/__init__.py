"""Does everything work on this machine and its device?"""
