"""The command line: one file for each command; each parses, calls a workflow and prints."""
