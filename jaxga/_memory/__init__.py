"""How large a micro-batch fits into a device's memory?"""
