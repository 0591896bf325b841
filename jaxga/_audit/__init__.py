"""Is an accumulated gradient that of the full batch; and where it is not, why?"""
