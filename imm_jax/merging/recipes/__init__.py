"""Merges checkpoint folders by recipes, in mergekit's format or from the command line.

`mergekit` reads a recipe file into the `Recipe` of `recipe`, `arrange` opens its models, `command` merges and writes
them, and `documents` does so for files of several recipes.
"""
