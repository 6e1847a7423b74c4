"""The kinds of finished work in the store: each module says where its kind lies and makes it."""
