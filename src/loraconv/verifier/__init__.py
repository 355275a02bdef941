"""The proof that an output equals its source, by mathematics that shares nothing with the converter.

Nothing in this package may import the rules, the format tables or the converter: it states each format's definition a
second time, in its own words, and compares what is on disk.
"""
