"""The work of dpo.replay: a run made again up to one update, and that update looked into.

work.py what is asked, and one replay from its start to its files | history.py which settings and which state an update of a
run had, and whether what is made again equals it | pairs.py the pairs of an update and their share of its gradient
again.py updates made again, from a state that was kept, with other settings or without some pairs | pictures.py their images
"""
