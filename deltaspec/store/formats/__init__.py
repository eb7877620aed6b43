"""The JSON that deltaspec writes, key by key; the format pages say it in words, and NotRequired what may be missing."""
