"""What runs in any Python from 3.9 on that has NumPy, and nothing else.

Workers of other environments load these modules as the package ``cellimg_worker``, since they need
not have this one. So they import the standard library, NumPy and each other, relatively.
"""
