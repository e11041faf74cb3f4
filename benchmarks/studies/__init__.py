"""Studies of methods and of masks: small networks trained many times, so that differences can be told from chance."""
