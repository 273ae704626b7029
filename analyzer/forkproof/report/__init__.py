"""One document, several renderings: `json` for machines, `text` for people, `explain` for one finding in full.

Every renderer is a function of `forkproof.model.Report` alone, so it is tested from literals.
"""
