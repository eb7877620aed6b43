"""Attachments ⇄ what an adapter folder holds."""
