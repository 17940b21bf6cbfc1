"""Relations between answers of one layer: what must hold whatever the truth is."""

from twinmoe.oracle.relations.catalogue import RELATIONS, require_relation
from twinmoe.oracle.relations.relation import Complaint, Mapped, Relation

__all__ = ["RELATIONS", "Complaint", "Mapped", "Relation", "require_relation"]
