"""Arrays to numbers: scores of features, their uncertainty, memorisation, colours, classifiers.

May import `weights` and `run`; must not know files of images, data sets or systems.
"""
